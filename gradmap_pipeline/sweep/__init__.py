"""One layer in memory at a time: loading, running forwards and backwards, and what is kept between layers."""
