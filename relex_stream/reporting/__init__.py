"""One page about a store: its numbers, charts of them, HTML, tables.

`gather` reads the store once and makes plain `numbers`; everything else is made of those alone.
"""
