"""Which figures are clean (paper section 2): hand labels, a classifier trained from them, its verdict as columns.

A figure is polluted if it has more than six sub-figures or is man-made, as tables, plots and sketches are.
"""
