"""What a machine and a run tell of themselves: facts and figures in, findings and sentences out. Begin with findings.py
for the machine, with diagnostics.py for a run.
"""
