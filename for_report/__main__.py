"""Writes the report on all runs: a workbook, pictures and a page in for_report/ of the output folder.

    python for_report                           of the runs beside the scripts
    python for_report --output_dir ~/results    of the runs there

evaluation_report.xlsx   every hyperparameter and result, the 2020 study, comparisons, charts
123result.png            validation accuracy of all recipes
layer_increase.png       the study's presets by depth, beside the figures of 2020
lr_decay.png             the same by learning rate decay
confusion_matrix.png     the best run's mistakes
model_graph.png          the best run's network
demo.html                a page that classifies a picture in the browser, by the best run's network

What is there already and would not change is left alone. The table of all runs is printed by presets_and_results.py.
"""
import os
import sys

if __name__ == '__main__':  # code is imported from beside the scripts alone, and errors name this program
    sys.argv[0] = os.path.dirname(os.path.abspath(__file__))
    sys.path[0] = os.path.dirname(sys.argv[0])

from data_helpers import ArgumentParser, InputError, exit_on_input_error
from for_report.evidence import read_curves
from for_report.page import write_page
from presets_and_results import best_first, command, load_predictions, load_presets, no_runs


def report(output_dir):
    """Writes the workbook, the pictures and the page to for_report/ of output_dir, and prints which were written.

    Raises InputError where there are no runs, or where a file cannot be written.
    """
    from for_report import pictures, workbook  # with matplotlib and openpyxl, after --help
    presets = load_presets(output_dir)
    if not presets:
        raise InputError(no_runs(output_dir))
    presets = best_first(presets)
    predictions = load_predictions(presets, output_dir)
    curves = read_curves(presets, output_dir)

    def draw(figure, name):
        pictures.write_picture(figure, output_dir, name)

    workbook.write_workbook(presets, predictions, output_dir)
    if curves:
        draw(pictures.runs_figure(presets, curves), '123result.png')
    else:
        print('not drawn  123result.png: no run has validation accuracies in its summaries')
    draw(pictures.depth_figure(presets, curves, predictions), 'layer_increase.png')
    draw(pictures.decay_figure(presets, curves, predictions), 'lr_decay.png')
    compared = [preset for preset in presets if preset.timestamp in predictions]
    if compared:
        best = compared[0]
        draw(pictures.confusion_figure(best, *predictions[best.timestamp]), 'confusion_matrix.png')
    else:
        test = command('resnet_eval.py', '--timestamp', output_dir=output_dir)
        print(f'not drawn  confusion_matrix.png: no run has saved test predictions; a test saves them: {test}')
    draw(pictures.network_figure(presets[0]), 'model_graph.png')
    write_page(presets[0], predictions, output_dir)


@exit_on_input_error
def main(arguments=None):
    parser = ArgumentParser(needs_data=False, description=__doc__)
    report(parser.parse_args(arguments).output_dir)


if __name__ == '__main__':
    main()
