"""`make bench`: one module per table, each with `run(options) -> Section`; `report` prints them."""
