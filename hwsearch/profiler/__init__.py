"""The sequential experiment that fills a latency table."""
