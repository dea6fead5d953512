"""The report's pictures, and the contact sheet of a person's own images: all of matplotlib.

Colours are those of Okabe and Ito, which people tell apart whatever their colour vision. Lines differ in marker and
stroke too, for a print in grey. No picture depends on the user's matplotlibrc.
"""
import collections
import contextlib
import io
import logging
import textwrap

import numpy as np

logging.getLogger('matplotlib').setLevel(logging.ERROR)  # quiet while it builds its font cache, on import
from matplotlib import font_manager, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from data_helpers import CLASSES, shortened
from presets_and_results import NAMES, confusion_matrix, differences, recipe, unfinished
from for_report.evidence import (OURS, STUDY, STUDY_2020, network_stages, study_gaps, study_points, study_runs,
                                 study_series, write_report)

BLUE, ORANGE, GREEN, PURPLE = '#0072B2', '#E69F00', '#009E73', '#CC79A7'
BLACK, SKY, VERMILLION = '#000000', '#56B4E9', '#D55E00'
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, BLACK)  # neighbours differ in grey
INK, FAINT, THIN, PALE = '#333333', '#767676', '#BBBBBB', '#DDDDDD'  # of words, of less important ones, of rules
MARKERS = 'osD^vPX*<>'
STROKES = ('-', '--', '-.', ':')
SHIFT = {STUDY: -0.13, OURS: 0.13}  # from a preset's place to its points
NAMED = 10          # recipes, the best ones, that have a colour and a name; further ones are thin lines
LABEL_WIDTH = 34    # letters of a line of a legend
LOG_SCALE_FROM = 4  # times that the longest training is as long as the shortest
DPI = 110           # pixels per inch
STYLE = {
    'font.size': 9, 'text.color': INK, 'axes.labelcolor': INK, 'axes.edgecolor': FAINT, 'xtick.color': INK,
    'ytick.color': INK, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.grid': True,
    'axes.axisbelow': True, 'grid.color': '#E6E6E6', 'grid.linewidth': 0.7, 'axes.titlesize': 10,
    'axes.titleweight': 'bold', 'axes.titlelocation': 'left', 'legend.frameon': False, 'legend.fontsize': 8,
    'lines.linewidth': 1.5, 'lines.markersize': 5}
WIDE_FONTS = ('NanumGothic', 'Noto Sans CJK KR', 'Noto Sans CJK JP', 'Malgun Gothic', 'Apple SD Gothic Neo',
              'Arial Unicode MS', 'Microsoft YaHei', 'WenQuanYi Zen Hei')  # where file names need them


# ------------------------------------------------------------------------------ figures

@contextlib.contextmanager
def report_style():
    """matplotlib's defaults and STYLE for a while, in place of what the user's matplotlibrc says."""
    with style.context(['default', STYLE]):
        yield


def new_figure(width, height):
    """A matplotlib Figure of so many inches, drawn without a window."""
    return Figure(figsize=(width, height), dpi=DPI, facecolor='white')


def write_picture(figure, output_dir, name, quiet=False):
    """Draws a Figure into for_report/<name>, a PNG. Raises InputError where it cannot be written."""
    content = io.BytesIO()
    with report_style():
        FigureCanvasAgg(figure).print_png(content)
    write_report(output_dir, name, content.getvalue(), quiet=quiet)


def line_style(k):
    """How line k looks: no two of the first ten look alike, in colour or in grey."""
    return dict(color=PALETTE[k % len(PALETTE)], marker=MARKERS[k % len(MARKERS)], linestyle=STROKES[k % len(STROKES)])


def marked(steps):
    """Which points of a line have markers: all, or those that stand well apart."""
    return 1 if len(steps) <= 20 else 0.07  # of the figure's diagonal


def percent_axis(axes, name):
    """Marks the y axis as accuracies, 0 to 1, in percent."""
    axes.set_ylabel(name)
    axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f'{round(100 * share, 6):g}%'))


def step_axis(axes):
    """Marks the x axis as training steps."""
    axes.set_xlabel('training steps')
    axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))


# ------------------------------------------------------------------------------ all runs

Line = collections.namedtuple('Line', 'runs steps accuracies')


def lines_by_recipe(presets, curves):
    """The runs that have curves, a Line for each recipe, in the order of their first.

    `steps` are common to its runs, `accuracies` float64 [runs, steps]. Unfinished runs, runs that were validated
    at other steps, and of each seed all but the first, have lines of their own.
    """
    groups, firsts = collections.OrderedDict(), {}
    presets = [preset for preset in presets if preset.timestamp in curves]
    keys = {preset: (recipe(preset), unfinished(preset), tuple(curves[preset.timestamp][0])) for preset in presets}
    for preset in sorted(presets, key=lambda preset: preset.timestamp):
        firsts.setdefault((keys[preset], preset.seed), preset)
    for preset in presets:
        again = firsts[keys[preset], preset.seed] is not preset
        groups.setdefault((keys[preset], again and preset.timestamp), []).append(preset)
    return [Line(runs, curves[runs[0].timestamp][0], np.array([curves[run.timestamp][1] for run in runs]))
            for runs in groups.values()]


def mean_test_accuracy(runs):
    """0 to 1, of those that are tested; None where none is."""
    tested = [run.test_accuracy for run in runs if run.finished]
    return np.mean(tested) if tested else None


def recipe_name(preset):
    """The name of its preset, as 'fast', or 'preset 77' where that has none."""
    return preset.name if preset.preset in NAMES else f'preset {preset.preset}'


def recipe_label(runs):
    """A recipe's name, what differs from the preset, its number of seeds, and its test accuracy, in a few lines."""
    first, tested = runs[0], mean_test_accuracy(runs)
    words = [recipe_name(first), differences(first), unfinished(first), f'{len(runs)} seeds' if len(runs) > 1 else '']
    name = textwrap.shorten(', '.join(word for word in words if word), 4 * LABEL_WIDTH, placeholder=' ...')
    result = 'not tested' if tested is None else f'{tested:.1%}'
    return textwrap.fill(f'{name}: {result}', LABEL_WIDTH)


def runs_figure(presets, curves):
    """The best validation accuracy so far over training steps: a line for each recipe, the mean of its seeds.

    `presets` are best first, `curves` are read_curves'.
    """
    with report_style():
        figure = new_figure(9, 5)
        axes = figure.add_subplot(111)
        lines = sorted(lines_by_recipe(presets, curves), key=lambda line: -(mean_test_accuracy(line.runs) or 0))
        for k, line in enumerate(lines[:NAMED]):
            on_top = 3 + (NAMED - k) / NAMED  # the better, the further
            draw_line(axes, line, line_style(k), recipe_label(line.runs), on_top)
        for line in lines[NAMED:]:
            axes.plot(line.steps, best_so_far(line).mean(0), color=THIN, linewidth=0.7)
        if len(lines) > NAMED:
            more = len(lines) - NAMED
            axes.plot([], [], color=THIN, linewidth=0.7, label='1 more recipe' if more == 1 else f'{more} more recipes')
        ends = [line.steps[-1] for line in lines]
        if ends and max(ends) >= LOG_SCALE_FROM * min(ends):
            _log_scale(axes)
        step_axis(axes)
        percent_axis(axes, 'validation accuracy, best so far')
        axes.legend(loc='upper left', bbox_to_anchor=(1.01, 1), labelspacing=0.9, handlelength=3)
        axes.set_title('Validation of all recipes')
        axes.text(1.03, 1.015, 'recipe: test accuracy', transform=axes.transAxes, weight='bold')
        figure.subplots_adjust(left=0.085, right=0.7, bottom=0.1, top=0.93)
        return figure


def best_so_far(line):
    """float64 [runs, steps]: of a checkpoint chosen by validation."""
    return np.maximum.accumulate(line.accuracies, axis=1)


def draw_line(axes, line, look, label=None, zorder=3):
    """The best accuracy so far: the mean of a Line's runs and, where there are several, the band of their range."""
    best = best_so_far(line)
    axes.plot(line.steps, best.mean(0), label=label, zorder=zorder, markevery=marked(line.steps), **look)
    if len(best) > 1:
        axes.fill_between(line.steps, best.min(0), best.max(0), color=look['color'], alpha=0.18, linewidth=0)


def _log_scale(axes):
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())


# ------------------------------------------------------------------------------ depth and decay

STUDY_NOTE = ('Hollow: the 2020 study (one Colab GPU, one seed each), by its own figures. Filled: this collection. '
              'Bars: the 95% interval of a run, or the range of several seeds.')


def depth_figure(presets, curves, predictions):
    """The study's presets that differ in depth alone: what 2020 found, and what this collection found."""
    names = {number: f'{study.depth} layers' for number, study in STUDY_2020.items()}
    return _study_figure('num_residual_units', 'Depth', names, STUDY_NOTE, presets, curves, predictions)


def decay_figure(presets, curves, predictions):
    """The study's presets that differ in the decay of the learning rate alone, as depth_figure shows them."""
    names = {number: f'{study.model}, decay {study.lr_decay:g}' for number, study in STUDY_2020.items()}
    note = f'Decay: the factor on the learning rate every 24,000 steps. {STUDY_NOTE}'
    return _study_figure('lr_decay', 'Decay', names, note, presets, curves, predictions)


def _study_figure(field, title, names, note, presets, curves, predictions):
    """Validation on the left and test on the right of the presets that differ in `field`; `names` are in words."""
    with report_style():
        figure = new_figure(9, 5.1)
        left, right = figure.subplots(1, 2)
        series = study_series(field)
        places = _places(series)
        looks = {number: line_style(k) for k, number in enumerate(places)}
        _draw_study_curves(left, looks, names, presets, curves)
        for numbers in series:
            _draw_study_points(right, places, looks, study_points(numbers, presets, predictions))
        _name_places(right, places, names)
        left.set_title(f'{title}: validation, best so far')
        right.set_title(f'{title}: test')
        words = textwrap.fill(f'{note} {study_gaps(places, presets)}', 150)
        figure.text(0.015, 0.12, words, fontsize=8, color=FAINT, va='top', linespacing=1.4)
        figure.subplots_adjust(left=0.08, right=0.985, bottom=0.26, top=0.94, wspace=0.25)
        return figure


def _places(series):
    """Where the presets of the series stand, side by side, with a gap after each series: {number: x}."""
    places, x = {}, 0.0
    for numbers in series:
        for number in numbers:
            places[number] = x
            x += 1
        x += 0.4
    return places


def _draw_study_curves(axes, looks, names, presets, curves):
    """The best validation accuracy so far, every validation faintly, and what was 2020's best at the end."""
    bests = []
    for number, look in looks.items():
        study = STUDY_2020[number]
        for line in lines_by_recipe(study_runs(number, presets), curves):
            for accuracies in line.accuracies:
                axes.plot(line.steps, accuracies, color=look['color'], alpha=0.2, linewidth=0.8)
            draw_line(axes, line, look)
            bests.append(line.accuracies.max())
        axes.plot(study.early_stopping_epoch, study.val_accuracy, linestyle='', marker=look['marker'],
                  color=look['color'], markerfacecolor='white', markersize=7, markeredgewidth=1.5, zorder=4)
        axes.plot([], [], label=f'{study.name}: {names[number]}', **look)
    rise = 0.15 if bests else 0.04  # of the curves, what is shown
    if not bests:
        axes.text(0.03, 0.95, 'no run of these presets has curves here', va='top', transform=axes.transAxes)
    bests += [STUDY_2020[number].val_accuracy for number in looks]
    axes.set_xlim(0, 1.02 * STUDY_2020[1].length())
    axes.set_ylim(min(bests) - rise, max(bests) + 0.02)
    axes.legend(loc='lower right', handlelength=3)
    step_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    percent_axis(axes, 'validation accuracy')


def _draw_study_points(axes, places, looks, points):
    """Points at the places of their presets: what 2020 found hollow, on the left, what was found here filled."""
    shifts = SHIFT if any(point.source == OURS for point in points) else {STUDY: 0}
    for source, shift in shifts.items():
        found = [point for point in points if point.source == source]
        axes.plot([places[point.preset.preset] + shift for point in found], [point.accuracy for point in found],
                  color=FAINT, linewidth=1, linestyle=':' if source == STUDY else '-')
    for point in points:
        highest = max(rival.accuracy for rival in points if rival.preset is point.preset)
        _draw_point(axes, places[point.preset.preset] + shifts[point.source], point, looks[point.preset.preset],
                    above=point.accuracy == highest)


def _draw_point(axes, x, point, look, above):
    """A Point with its interval, and its accuracy above or below it, turned away from its rival's."""
    colour, hollow = look['color'], point.source == STUDY
    axes.errorbar(x, point.accuracy, [[point.accuracy - point.low], [point.high - point.accuracy]],
                  marker=look['marker'], color=colour, markerfacecolor='white' if hollow else colour, markersize=7,
                  markeredgewidth=1.5, capsize=3, linewidth=1.2)
    seeds = f'\n{point.seeds} seeds' if point.seeds > 1 else ''
    axes.annotate(f'{point.accuracy:.1%}{seeds}', (x, point.high if above else point.low),
                  (8 if hollow else -8, 4 if above else -4), textcoords='offset points', fontsize=8,
                  ha='right' if hollow else 'left', va='bottom' if above else 'top')


def _name_places(axes, places, names):
    """The presets below their places, and what the axis measures."""
    axes.set_xticks(list(places.values()))
    axes.set_xticklabels([f'{STUDY_2020[number].name}\n' + names[number].replace(', ', '\n') for number in places])
    axes.set_xlim(-0.6, max(places.values()) + 0.6)
    axes.margins(y=0.15)
    axes.grid(False, axis='x')
    percent_axis(axes, 'test accuracy')


# ------------------------------------------------------------------------------ mistakes

def confusion_figure(preset, labels, predictions):
    """True classes in rows, predicted ones in columns, counts of test images. Takes int64 [N] twice."""
    n = len(CLASSES)
    confusion = confusion_matrix(labels, predictions, preset.num_classes)[:n, :n]
    share = confusion / np.maximum(np.bincount(labels, minlength=n)[:, None], 1)
    hits = np.eye(n, dtype=bool)
    with report_style():
        figure = new_figure(7.8, 6.6)
        axes = figure.add_subplot(111)
        for shown, colour in ((hits, BLUE), (~hits, VERMILLION)):
            cells = np.ma.array(share, mask=~shown)
            axes.imshow(cells, cmap=LinearSegmentedColormap.from_list('', ['white', colour]), vmin=0,
                        vmax=max(cells.max(), 1e-9))
            for i, k in np.argwhere(shown):
                dark = share[i, k] > 0.6 * cells.max()
                axes.text(k, i, f'{confusion[i, k]:,}', ha='center', va='center', fontsize=9,
                          color='white' if dark else INK)
        _label_classes(axes, confusion, labels)
        beyond = len(labels) - int(confusion.sum())
        axes.set_xlabel('predicted class' + (f'; {beyond:,} images beyond the ten' if beyond else ''))
        axes.set_title(f'{recipe_name(preset)}, run {preset.timestamp}: {preset.test_accuracy:.2%} of {len(labels):,} '
                       'test images right')
        note = ('Counts of test images. Blue: right. Orange: mistakes, the more frequent the darker. On the right: '
                'accuracy by class.')
        figure.text(0.02, 0.015, note, fontsize=8, color=FAINT)
        figure.subplots_adjust(left=0.13, right=0.92, bottom=0.16, top=0.94)
        return figure


def _label_classes(axes, confusion, labels):
    """Names the classes on both axes, with the accuracy of each true class on the right."""
    places = range(len(CLASSES))
    axes.set_xticks(places)
    axes.set_yticks(places)
    axes.set_xticklabels(CLASSES, rotation=40, ha='right', rotation_mode='anchor')
    axes.set_yticklabels(CLASSES)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_ylabel('true class')
    for spine in axes.spines.values():
        spine.set_visible(False)
    for k in places:
        total = int((labels == k).sum())
        if total:
            axes.text(len(CLASSES) - 0.35, k, f'{confusion[k, k] / total:.1%}', va='center', fontsize=9, weight='bold')


# ------------------------------------------------------------------------------ the network

BOX, GAP, LEFT = 7.4, 1.8, 14.8  # of the network's boxes: width, space between, where the first begins


def network_figure(preset):
    """The network of a preset: for each stage the operations of its first unit, its shape and its parameters."""
    stages = network_stages(preset)
    with report_style():
        figure = new_figure(9.5, 6.4)
        axes = figure.add_axes([0, 0, 1, 1])
        axes.set_xlim(0, 95)
        axes.set_ylim(0, 64)
        axes.axis('off')
        total = sum(stage.parameters for stage in stages)
        axes.text(2, 61, f'ResNet{preset.depth} ({recipe_name(preset)}): {preset.depth} layers with weights, {total:,} '
                  'parameters', fontsize=12, weight='bold', va='center')
        for x, text, align in ((2, 'input 32 x 32 x 3', 'left'), (80, 'output shape', 'center'),
                               (93, 'parameters', 'right')):
            axes.text(x, 56.5, text, fontsize=9, ha=align, va='center', color=FAINT)
        for row, stage in enumerate(stages):
            _draw_stage(axes, stage, 49.5 - 11.4 * row)
        return figure


def _draw_stage(axes, stage, y):
    """A row of network_figure, whose middle is at y."""
    axes.axhline(y + 5.5, color=PALE, linewidth=0.7)
    axes.text(2, y + (1.2 if stage.units else 0), stage.name, fontsize=11, weight='bold', va='center')
    axes.text(80, y, ' x '.join(map(str, stage.shape)), fontsize=10, ha='center', va='center')
    axes.text(93, y, f'{stage.parameters:,}', fontsize=10, ha='right', va='center')
    middle = y + (1.6 if stage.units else 0)
    starts = [LEFT + (BOX + GAP) * k for k in range(len(stage.operations))]
    for x, operation in zip(starts, stage.operations):
        _draw_box(axes, x, middle, operation)
    for x in starts[1:]:
        _draw_arrow(axes, (x - GAP, middle), (x, middle))
    if stage.units:
        units = '1 unit' if stage.units == 1 else f'{stage.units} units'
        axes.text(2, y - 1.7, units, fontsize=9, va='center')
        _draw_shortcut(axes, stage, starts, middle, y - 3.6)


def _draw_box(axes, x, middle, operation):
    colour = {'conv': SKY, 'dense': ORANGE, 'mean': GREEN}.get(operation.split()[0], PALE)
    axes.add_patch(FancyBboxPatch((x + 0.25, middle - 2.6), BOX - 0.5, 5.2, boxstyle='round,pad=0.25', linewidth=0.9,
                                  facecolor=to_rgba(colour, 0.4), edgecolor=FAINT))
    axes.text(x + BOX / 2, middle, operation, fontsize=8, ha='center', va='center', linespacing=1.1)


def _draw_arrow(axes, start, end):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=8, color=FAINT, linewidth=0.9,
                                   shrinkA=0, shrinkB=0))


def _draw_shortcut(axes, stage, starts, middle, low):
    """A unit's way in, its sum, and the shortcut below its boxes, from its start or from after the activation."""
    end = starts[-1] + BOX + 2.3
    _draw_arrow(axes, (starts[0] - 2.2, middle), (starts[0], middle))
    _draw_arrow(axes, (starts[-1] + BOX, middle), (end - 0.9, middle))
    axes.text(end, middle, '+', fontsize=13, ha='center', va='center')
    start = starts[2] - GAP / 2 if stage.shortcut.startswith('from after') else starts[0] - 1.6
    axes.plot([start, start, end], [middle, low, low], color=FAINT, linewidth=0.9)
    _draw_arrow(axes, (end, low), (end, middle - 1.2))
    axes.text((start + end) / 2, low + 0.3, f'shortcut: {stage.shortcut}', fontsize=7.5, ha='center', va='bottom',
              color=FAINT)


# ------------------------------------------------------------------------------ own images

CELL = 5.2, 1.75  # inches, of an image on the contact sheet
ACROSS = 3        # cells at most beside one another


def contact_sheet(preset, labels, previews, pictures, probabilities, output_dir, quiet=False):
    """for_report/used_images.png: an image a cell, as given, as the network saw it, and its probabilities.

    `labels` are the images' names, printable; `previews` Pillow images, perhaps of the first ones only; `pictures`
    uint8 [32, 32, 3]; `probabilities` float32 [images, classes], of the run `preset`, means over an image and its
    mirror image.
    """
    shown = len(previews)
    across = min(ACROSS, -(-shown // 4))
    down = -(-shown // across)
    width, height = CELL
    with report_style():
        figure = new_figure(width * across, height * down + 0.5)
        axes = figure.add_axes([0, 0, 1, 1])
        title, family = _drawable(preset.title)
        axes.text(0.1, height * down + 0.32, title, fontsize=9, va='center', weight='bold', family=family)
        rest = '' if shown == len(pictures) else f'; the first {shown} of {len(pictures):,} images'
        axes.text(0.1, height * down + 0.12,
                  f'as given, as the network saw it (32x32), probabilities in %, mirror image included{rest}',
                  fontsize=8, va='center')
        for k in range(shown):
            left, bottom = width * (k % across), height * (down - 1 - k // across)
            text, family = _drawable(shortened(labels[k], 48))
            axes.text(left + 0.1, bottom + 1.6, text, fontsize=8, va='center', family=family)
            _draw_pictures(axes, left, bottom + 0.78, previews[k], pictures[k])
            _draw_probabilities(axes, left + 3.75, bottom + 0.78, probabilities[k][:len(CLASSES)])
        axes.set_aspect('auto')
        axes.set_xlim(0, width * across)
        axes.set_ylim(0, height * down + 0.5)
        axes.axis('off')
    write_picture(figure, output_dir, 'used_images.png', quiet)


def _draw_pictures(axes, left, middle, preview, picture):
    """An image as given, in its proportions, and as the network saw it."""
    columns, rows = preview.size
    scale = 1.4 / max(columns, rows)
    x = left + 0.8
    half = max(columns * scale / 2, 0.015), max(rows * scale / 2, 0.015)  # a hair at least
    axes.imshow(np.asarray(preview), extent=(x - half[0], x + half[0], middle - half[1], middle + half[1]),
                interpolation='antialiased' if max(columns, rows) > 32 else 'nearest')
    axes.imshow(picture, extent=(left + 1.6, left + 3, middle - 0.7, middle + 0.7), interpolation='nearest')


def _draw_probabilities(axes, left, middle, probabilities):
    """A bar for each class, the likeliest in another colour."""
    places = middle + 0.63 - 0.14 * np.arange(len(probabilities))
    colours = [BLUE if p == probabilities.max() else SKY for p in probabilities]
    axes.barh(places, probabilities, height=0.11, left=left, color=colours)
    axes.plot([left] * 2, [middle - 0.72, middle + 0.72], color=FAINT, linewidth=0.6)
    for place, name, p in zip(places, CLASSES, probabilities):
        axes.text(left - 0.05, place, name, fontsize=6, ha='right', va='center')
        axes.text(left + 0.05 + p, place, f'{100 * p:.1f}', fontsize=6, va='center')


def _drawable(text):
    """A text and a font of this machine that has its letters; those that none has become question marks."""
    letters = set(map(ord, text))
    for family in ('DejaVu Sans',) + WIDE_FONTS:
        try:
            path = font_manager.findfont(family, fallback_to_default=False)
        except ValueError:  # not installed
            continue
        if letters <= font_manager.get_font(path).get_charmap().keys():
            break
    else:
        family = 'DejaVu Sans'
        known = font_manager.get_font(font_manager.findfont(family)).get_charmap()
        text = ''.join(letter if ord(letter) in known else '?' for letter in text)
    return text.replace('$', r'\$'), family  # or matplotlib takes what is between two dollars for a formula
