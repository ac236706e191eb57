"""Other packages' interfaces over our attention, for code that was written against them.

Nothing here is imported by ``import whatwhere``: name the module that you need.
"""
