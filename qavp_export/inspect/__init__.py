"""Pictures and summaries of a bundle: which vision tokens it keeps and why, and what its graphs are made of."""
