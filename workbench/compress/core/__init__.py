"""What every method is given: the layers at work, batches of one shape, promises that are checked, the
report.
"""
