"""The proxy: has every connection and DNS query of a run decided, then moves it or says why not."""
