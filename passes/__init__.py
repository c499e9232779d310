"""One file, one pass; and the pipeline that runs them."""
