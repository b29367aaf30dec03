"""State tables and policies: what happens next, decided without sockets, threads, clocks or
mappings."""
