"""API workers: processes that speak HTTP, check, tokenise and serialise, around the one process that owns the engines.

``channel`` is what passes between the two, ``remote`` the worker's side, ``host`` the engines' side.
"""
