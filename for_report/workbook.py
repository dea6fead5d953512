"""for_report/evaluation_report.xlsx: every hyperparameter and result, the study of 2020, and comparisons.

Sheets: runs; 2020 study; uncertainty (pairs of networks); seeds; recipes (pairs of recipes by their seeds); charts.
"""
import io
import math
import os
import textwrap
import zipfile

from openpyxl import Workbook
from openpyxl.chart import Reference, ScatterChart, Series
from openpyxl.chart.data_source import NumDataSource, NumRef
from openpyxl.chart.error_bar import ErrorBars
from openpyxl.chart.label import DataLabelList
from openpyxl.chart.shapes import GraphicalProperties
from openpyxl.drawing.line import LineProperties
from openpyxl.styles import Alignment, Font, PatternFill
from openpyxl.utils import get_column_letter
from openpyxl.worksheet.page import PageMargins
from openpyxl.worksheet.pagebreak import Break
from openpyxl.worksheet.properties import PageSetupProperties

from for_report.uncertainty import HINT, compare_recipes, verdict
from presets_and_results import (COLUMNS, compare_networks, describe, differences, over_seeds, remark, test_interval)
from for_report.evidence import (OURS, STUDY, STUDY_2020, study_gaps, study_points, study_runs, study_series,
                                 write_report)

COLUMN_GROUPS = {  # the first column of each
    'preset': 'setCustomParameters', 'lr': 'setModelParameters', 'batch_size': 'setTrainingParameters',
    'allow_soft_placement': 'setMiscParameters', 'timestamp': 'results', 'schedule': 'setRecipeParameters',
    'test_accuracy_mirrored': 'results, with mirror image', 'test_95_low': 'comparison'}
P = '[<0.000000000001]"<1E-12";[<0.001]0.0E+00;0.000'  # a p that is too small for digits is not 0
POINTS = '+0.00%;-0.00%'
FORMATS = {'training_time': '0.0', 'images_per_second': '0', 'p': P, 'adjusted_p': P, 'difference_accuracy': POINTS,
           'difference_95_low': POINTS, 'difference_95_high': POINTS}
WIDEST = 44        # letters of a column; longer texts go over several lines
LINE, TALLEST = 15, 409  # points: of a line, and of the tallest row that Excel allows
PAGE = 110         # letters across a landscape page of A4 at a scale of 100 %, also in a wide font

HEADING = Font(name='Calibri', size=11, bold=True)
HEADING_FILL = PatternFill('solid', fgColor='DCEBF5')
BEST_FILL = PatternFill('solid', fgColor='FBE9C6')
NOTE = Font(name='Calibri', size=11, italic=True)
SOURCES = {  # of the charts' points: colour (Okabe and Ito's, as in the pictures) and marker of each series
    STUDY: (('E69F00', 'diamond'), ('CC79A7', 'triangle')),
    OURS: (('0072B2', 'circle'), ('009E73', 'square'))}
LABELS = {STUDY: 'l', OURS: 'r'}  # left and right of the points


def write_workbook(presets, predictions, output_dir):
    """for_report/evaluation_report.xlsx of the runs, best first. Raises InputError where it cannot be written."""
    workbook = Workbook()
    groups = over_seeds(presets)
    _fill_runs(workbook.active, presets, predictions)
    _fill_study(workbook.create_sheet(), presets, predictions)
    _fill_uncertainty(workbook.create_sheet(), presets, predictions)
    _fill_seeds(workbook.create_sheet(), groups)
    _fill_recipes(workbook.create_sheet(), groups)
    _fill_charts(workbook.create_sheet(), presets, predictions)
    content = io.BytesIO()
    workbook.save(content)
    write_report(output_dir, 'evaluation_report.xlsx', content.getvalue(), same=same_workbook)


def same_workbook(path, content):
    """Whether a workbook differs from another one's bytes in nothing but the time of saving.

    Nothing of a foreign file is inflated: the sizes and checksums of the parts are in its directory.
    """
    if os.path.getsize(path) > 2 * len(content):
        return False
    return _parts(path) == _parts(io.BytesIO(content))


def _parts(file):
    with zipfile.ZipFile(file) as archive:
        return {part.filename: (part.file_size, part.CRC) for part in archive.infolist()
                if part.filename != 'docProps/core.xml'}


# ------------------------------------------------------------------------------ sheets

def _fill_runs(sheet, presets, predictions):
    sheet.title = 'runs'
    header = ['#'] + list(COLUMNS) + ['test_95_low', 'test_95_high', 'differs_from_preset', 'remark']
    groups = [COLUMN_GROUPS.get(name) for name in header]
    rows = []
    for number, preset in enumerate(presets, 1):
        remarks = filter(None, ['best' if number == 1 and preset.finished else '', remark(preset)])
        bounds = test_interval(preset, predictions) or (None, None)
        rows.append([number] + [getattr(preset, name) for name in COLUMNS]
                    + [*bounds, differences(preset), ', '.join(remarks)])
    _fill(sheet, [groups, header] + rows, headers=2)
    starts = [k for k, group in enumerate(groups, 1) if group]
    for start, end in zip(starts, starts[1:] + [len(header) + 1]):
        sheet.merge_cells(start_row=1, end_row=1, start_column=start, end_column=end - 1)
    if presets[0].finished:
        for cell in sheet[3]:
            cell.font, cell.fill = HEADING, BEST_FILL
    sheet.freeze_panes = 'C3'
    sheet.auto_filter.ref = f'A2:{sheet.cell(len(rows) + 2, len(header)).coordinate}'
    _break_pages(sheet, starts, repeated=1, scale=70)


def _fill_study(sheet, presets, predictions):
    """The 2020 results beside ours of the same recipe, their length apart: the best of them by validation accuracy."""
    sheet.title = '2020 study'
    names = ['val_accuracy', 'test_accuracy', 'test_95_low', 'test_95_high', 'training_time', 'early_stopping_epoch']
    rows = [[None, None, None, 'study of 2020: one Colab GPU, one seed each'] + [None] * 5
            + ['this collection'] + [None] * 4 + ['this collection, its training'],
            ['preset', 'model', 'lr_decay'] + names + ['timestamp'] + names + ['steps', 'device', 'remark']]
    for number, study in STUDY_2020.items():
        row = [number, study.model, study.lr_decay] + _study_results(study, {})
        tested = [run for run in study_runs(number, presets) if run.finished]
        if tested:
            ours = max(tested, key=lambda run: run.val_accuracy or 0)
            row += [ours.timestamp] + _study_results(ours, predictions) + [ours.steps, ours.device, remark(ours)]
        else:
            row.append('none tested')
        rows.append(row)
    _fill(sheet, rows, headers=2)
    for title in ('D1:I1', 'J1:N1', 'O1:S1'):
        sheet.merge_cells(title)
    sheet.freeze_panes = 'B3'
    _break_pages(sheet, [4, 10, 15], repeated=3, scale=80)


def _study_results(preset, predictions):
    return [preset.val_accuracy, preset.test_accuracy, *test_interval(preset, predictions), preset.training_time,
            preset.early_stopping_epoch]


def _fill_uncertainty(sheet, presets, predictions):
    sheet.title = 'uncertainty'
    note = ("Do these two networks differ on the same test images? McNemar's exact test; adjusted_p is corrected for "
            'the number of pairs (Holm).')
    rows = [['first', 'second', 'first_run', 'second_run', 'first_test_accuracy', 'second_test_accuracy',
             'only_first_right', 'only_second_right', 'p', 'adjusted_p', 'these two networks']]
    for pair in compare_networks(presets, predictions):
        first, second = presets[pair.first - 1], presets[pair.second - 1]
        rows.append([pair.first, pair.second, first.timestamp, second.timestamp, first.test_accuracy,
                     second.test_accuracy, pair.only_first, pair.only_second, pair.p, pair.adjusted_p, verdict(pair)])
    _fill_noted(sheet, note + ' Pairs of one recipe are left out: seeds compare recipes.', rows)


def _fill_seeds(sheet, groups):
    sheet.title = 'seeds'
    rows = [['recipe', 'model', 'seeds', 'number_of_seeds', 'mean_test_accuracy', 'standard_deviation_accuracy',
             'lowest_accuracy', 'highest_accuracy']]
    for seeds in groups:
        rows.append([describe(seeds.run), seeds.run.model, ', '.join(map(str, seeds.seeds)), len(seeds.seeds),
                     seeds.mean, seeds.deviation, seeds.low, seeds.high])
    _fill_noted(sheet, 'Recipes that were trained to their end with several seeds, and tested.', rows)


def _fill_recipes(sheet, groups):
    sheet.title = 'recipes'
    note = ("Do two recipes differ? The difference of their mean test accuracies with Welch's 95% interval, where both "
            f'have three seeds or more; a hint where one has fewer than {HINT}.')
    rows = [['first', 'second', 'first_seeds', 'second_seeds', 'difference_accuracy', 'difference_95_low',
             'difference_95_high', 'these two recipes']]
    for first, second, difference, low, high in compare_recipes(groups):
        rows.append([describe(first.run), describe(second.run), len(first.seeds), len(second.seeds), difference,
                     low, high, _recipes_verdict(first, second, low, high)])
    _fill_noted(sheet, note, rows)


def _recipes_verdict(first, second, low, high):
    if low <= 0 <= high:
        return 'cannot be told apart'
    better = 'the first is better' if low > 0 else 'the second is better'
    hint = min(len(first.seeds), len(second.seeds)) < HINT
    return f'hint: {better}' if hint else better


# ------------------------------------------------------------------------------ charts

CHARTS = (  # the field compared, its column, the title and the axis of its chart, the distance of its ticks
    ('num_residual_units', 'depth', 'Test accuracy by depth', 'layers', 10),
    ('lr_decay', 'lr_decay', 'Test accuracy by decay', 'factor on the learning rate every 24,000 steps', 0.02))
CHART_COLUMNS = ('chart', 'source', 'preset', 'model', 'depth', 'lr_decay', 'test_accuracy', 'bar_below_accuracy',
                 'bar_above_accuracy')


def _fill_charts(sheet, presets, predictions):
    """Test accuracy by depth and by decay, as in the pictures: the points as a table, and Excel's charts of them."""
    sheet.title = 'charts'
    rows, charts = [list(CHART_COLUMNS)], []
    notes = ['2020 study: one Colab GPU, one seed each.',
             'Bars: the 95% interval of a run, or the range of several seeds.']
    for field, column, title, axis, unit in CHARTS:
        series = study_series(field)
        points = [study_points(numbers, presets, predictions) for numbers in series]
        charts.append(_chart(sheet, column, title, axis, unit, points, len(rows) + 1))
        rows += [_chart_row(column, point) for line in points for point in line]
        gaps = study_gaps([number for numbers in series for number in numbers], presets)
        notes += [f'{title}. {gaps}'] if gaps else []
    _fill(sheet, rows, headers=1)
    sheet.page_setup.fitToHeight = 1
    below = len(rows) + 2
    lines = [line for note in notes for line in textwrap.wrap(note, PAGE)]
    for k, line in enumerate(lines):
        sheet.cell(below + k, 1, line).font = NOTE
    for chart, column in zip(charts, 'AG'):
        sheet.add_chart(chart, f'{column}{below + len(lines) + 1}')


def _chart_row(column, point):
    study = point.preset
    return [column, point.source, study.preset, study.model, study.depth, study.lr_decay, point.accuracy,
            point.accuracy - point.low, point.high - point.accuracy]


def _chart(sheet, column, title, axis, unit, points, row):
    """A scatter chart of lines of Points, which stand in the sheet from `row` on, one after the other."""
    chart = ScatterChart()
    chart.style, chart.scatterStyle, chart.title = 1, 'lineMarker', title
    chart.x_axis.title, chart.y_axis.title = axis, 'test accuracy'
    chart.x_axis.delete = chart.y_axis.delete = False  # or newer openpyxl leaves them out
    chart.x_axis.majorGridlines = None
    chart.y_axis.majorGridlines.spPr = GraphicalProperties(ln=LineProperties(solidFill='E0E0E0'))
    chart.x_axis.number_format, chart.y_axis.number_format = 'General', '0.0%'
    chart.x_axis.majorUnit = unit
    chart.y_axis.scaling.min = math.floor(100 * min(point.low for line in points for point in line)) / 100
    chart.y_axis.scaling.max = math.ceil(100 * max(point.high for line in points for point in line)) / 100
    chart.width, chart.height, chart.legend.position = 12, 8.5, 'b'  # centimetres; two stand side by side
    for rank, line in enumerate(points):
        for source, styles in SOURCES.items():
            found = [point for point in line if point.source == source]
            if found:
                name = f'{source}, {found[0].preset.model}' if len(points) > 1 else source
                chart.series.append(_series(sheet, column, row, len(found), name, LABELS[source], *styles[rank]))
                row += len(found)
    return chart


def _series(sheet, column, first, n, title, label, colour, symbol):
    """n rows of the table of points from row `first` on as a series, with error bars."""
    def cells(name):
        k = CHART_COLUMNS.index(name) + 1
        return Reference(sheet, min_col=k, min_row=first, max_row=first + n - 1)

    series = Series(cells('test_accuracy'), cells(column), title=title)
    series.marker.symbol, series.marker.size = symbol, 9
    series.marker.graphicalProperties = GraphicalProperties(solidFill=colour, ln=LineProperties(solidFill=colour))
    series.graphicalProperties.line.solidFill = colour
    series.graphicalProperties.line.width = 12700  # a point, in its 12,700ths
    series.smooth = False
    series.errBars = ErrorBars(
        errDir='y', errBarType='both', errValType='cust',
        minus=NumDataSource(NumRef(f=str(cells('bar_below_accuracy')))),
        plus=NumDataSource(NumRef(f=str(cells('bar_above_accuracy')))),
        spPr=GraphicalProperties(ln=LineProperties(solidFill=colour)))
    series.dLbls = DataLabelList(numFmt='0.0%', showVal=True, showSerName=False, showCatName=False,
                                 showLegendKey=False, showPercent=False, dLblPos=label)
    return series


# ------------------------------------------------------------------------------ cells and pages

def _fill(sheet, rows, headers):
    """Writes rows, the first of them `headers`, the last of these the columns' names, and sets a page up."""
    names = rows[headers - 1]
    widths = [4] * len(names)
    for i, row in enumerate(rows, 1):
        for k, (name, value) in enumerate(zip(names, row), 1):
            cell = sheet.cell(i, k)
            _write(cell, name, value)
            if i <= headers:
                cell.font, cell.fill = HEADING, HEADING_FILL
                cell.alignment = Alignment(horizontal='left' if i < headers else 'center')
            if i >= headers:  # the row of groups is merged over several columns
                widths[k - 1] = max(widths[k - 1], 8 if isinstance(value, float) else len(str(value)))
        lines = max(len(textwrap.wrap(str(value), WIDEST)) for value in row)
        if i > headers and lines > 1:  # not every program makes room by itself
            sheet.row_dimensions[i].height = min(lines * LINE, TALLEST)
    for k, width in enumerate(widths, 1):
        sheet.column_dimensions[get_column_letter(k)].width = min(width, WIDEST) + 3
    sheet.freeze_panes = sheet.cell(headers + 1, 1)
    sheet.print_title_rows = f'1:{headers}'
    sheet.page_setup.orientation, sheet.page_setup.paperSize = 'landscape', sheet.PAPERSIZE_A4
    sheet.page_setup.fitToHeight = 0
    sheet.page_margins = PageMargins(left=0.4, right=0.4, top=0.6, bottom=0.7, header=0.3, footer=0.3)
    sheet.sheet_properties.pageSetUpPr = PageSetupProperties(fitToPage=True)
    sheet.oddFooter.right.text = '&A, &P/&N'


def _write(cell, name, value):
    """A value in the format of its column; text as text, whatever it begins with."""
    if isinstance(value, str):
        cell.value, cell.data_type = value, 's'  # or '=1+1' is a formula
        cell.alignment = Alignment(horizontal='left', vertical='top', indent=1, wrap_text=len(value) > WIDEST)
    elif isinstance(value, float):
        cell.value = float(f'{value:.9g}')  # further digits vary with the versions of Python and SciPy
        percent = 'accuracy' in name or '_95_' in name
        cell.number_format = FORMATS.get(name, '0.00%' if percent else 'General')
        cell.alignment = Alignment(vertical='top')
    else:
        cell.value = value
        cell.alignment = Alignment(vertical='top')


def _fill_noted(sheet, note, rows):
    """A table below a note; the table says so where it is empty."""
    empty = [['none']] if len(rows) == 1 else []
    _fill(sheet, [[note]] + rows + empty, headers=2)
    for cell in sheet[1]:
        cell.font, cell.fill = NOTE, PatternFill()


def _break_pages(sheet, starts, repeated, scale):
    """Prints a wide sheet on several pages at a scale (percent) that can be read.

    Columns stay together with their group, of which `starts` are the first columns; a group wider than a page is
    divided evenly. The first `repeated` columns are printed on every page.
    """
    widths = [sheet.column_dimensions[get_column_letter(k)].width for k in range(1, sheet.max_column + 1)]
    room = PAGE * 100 / scale - sum(widths[:repeated])
    used, breaks = 0, []
    for start, end in zip(starts, starts[1:] + [len(widths) + 1]):
        group = sum(widths[start - 1:end - 1])
        share = group / math.ceil(group / room)  # of a page, where the group takes several
        if used and used + group > room:
            breaks.append(start - 1)
            used = 0
        for k in range(start, end):
            width = widths[k - 1]
            beyond = share < group and used + width / 2 > share
            if used and (beyond or used + width > room):
                breaks.append(k - 1)
                used = 0
            used += width
    for k in breaks:
        sheet.col_breaks.append(Break(id=k))
    sheet.print_title_cols = f'A:{get_column_letter(repeated)}'
    sheet.sheet_properties.pageSetUpPr.fitToPage, sheet.page_setup.scale = False, scale
