"""What `python -m benchmarks` measures, one part a file; every part writes JSON, and `page` makes one page of them."""
