"""Short rounds of tests/torture.py, which anyone can run for longer."""
import random

import pytest

import torture


@pytest.mark.parametrize('name, n', [
    pytest.param('kills', 3, marks=pytest.mark.long), ('writers', 100), ('inputs', 300)])
def test_a_short_round(name, n, tmp_path):
    said = torture.ROUNDS[name][0](n, random.Random(1), str(tmp_path))
    assert said.startswith({'kills': '3 kills', 'writers': '10 writers, 100 runs', 'inputs': '300 inputs'}[name])


def test_differences_are_seen(trained, tmp_path):
    """The comparison of two folders can fail."""
    import shutil
    from presets_and_results import load_preset
    output_dir = str(tmp_path / 'copied')
    shutil.copytree(trained[0], output_dir)
    torture.compare(trained[0], output_dir)
    preset = load_preset(output_dir)
    preset.update(dict(val_accuracy=0.123))
    preset.save(output_dir)
    with pytest.raises(torture.Broken, match='the records differ in val_accuracy'):
        torture.compare(trained[0], output_dir)
