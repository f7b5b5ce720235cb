"""The Hugging Face face of a bundle: a transformers model with `generate`, and a subcommand of `optimum-cli export`.

Optional and torch-using; production runs `qavp_export.QavpModel`. Importing this package imports neither library.
"""
