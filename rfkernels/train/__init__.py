"""Training of the embedded model: data from installable packages, captions, Muon, a resumable run.

Not imported by anything that only generates.
"""
