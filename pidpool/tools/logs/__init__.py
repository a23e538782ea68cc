"""``pidpool logs``: event logs are read (reading.py), made safe to show (clean.py), summarised in bounded
memory (processes.py, findings.py, unmatched.py, summary.py) and rendered (terminal.py, document.py, page.py).
"""
