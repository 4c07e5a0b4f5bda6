"""Latency tables: builds, their header and sections, and the Parquet file that holds them."""
