"""The report on all runs: `python for_report` writes its workbook and pictures into this folder."""
