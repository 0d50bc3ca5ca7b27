"""What several benchmarks share: servers, clients, peers, models without weights, options and reports."""
