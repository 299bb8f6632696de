"""A report as one page of HTML that needs no network: what was done to a graph, what it is, and what it costs."""
