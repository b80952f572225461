"""Diagnosis of the machine and of a run: facts and figures become findings and sentences. Begin with findings.py for
the machine, with diagnostics.py for a run.
"""
