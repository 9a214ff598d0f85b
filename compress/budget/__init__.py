"""Codecs by a budget: a size or a quality in, a codec for every tensor out.

`goal` what is asked for · `options` every codec tried on every tensor · `allocate` which to take ·
`size` what a delta will weigh, to the byte · `plan` all of it together · `search` for the smallest
delta within a KL.
"""
