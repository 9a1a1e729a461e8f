"""Sequential reasoning chains into checked parallel training data, with a language model (arXiv 2506.09991, 5.1).

Read in this order: `pipeline.py` (the five stages of one sample, from top to bottom), `questions.py` (what is asked;
`prompts/` has the words), `answers.py` (how answers are read), `plan.py` (from lines and groups to a tree of blocks),
`rewriting.py` (the last stage with its checks), `checks.py` and `gate.py` (what a text has to hold and when a block
pays), `curate.py` (the whole command). `live.py` and `batches.py` drive many samples; `providers/` knows vendors;
`run_folder.py` is what a killed run leaves behind. docs/curation.md explains the use.
"""
