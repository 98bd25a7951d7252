"""Raw to canonical: the Faust app, batch transport, normalise, enrich, dedupe, waiting room.

It is not: a caller of other systems; no HTTP happens here.
"""
