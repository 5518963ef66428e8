"""A model's weights as matrices: layers, sharing copies, quantizing and factored modules, packing, offload
and placement.
"""
