"""Text that has to have a form: grammars, and which tokens they allow next (with XGrammar, arXiv 2411.15100)."""
