"""Starts, stops and reports the threads; channels, transports, real RAM. The only room with
clocks."""
