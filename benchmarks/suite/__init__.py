"""What `python -m benchmarks` measures, one part a file.

Every part writes JSON, and `page` makes one page of them.
"""
