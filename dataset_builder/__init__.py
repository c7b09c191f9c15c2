"""The dataset builder: raw sources in, a folder out that `load_dataset` opens.

Read in this order: schema.py (what a row is), sources/ (raw files to rows), captions.py (boxes to words), queue.py
(texts related to an image), assemble.py (rows to Parquet and a card), build.py (the steps in their order),
__main__.py (the commands).
"""
