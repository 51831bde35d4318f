"""One HTML file about runs, which needs no network: python -m jepa_jax report WORKDIR [WORKDIR ...]."""
