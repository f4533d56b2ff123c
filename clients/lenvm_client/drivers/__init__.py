"""Guided decoding for one foreign backbone a module. Each imports its backbone's library, which the client does not."""
