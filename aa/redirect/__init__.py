"""The firewall rules that bring every packet of a proxied run to the proxy or to nothing."""
