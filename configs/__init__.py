"""YAML configurations; a package so that Hydra finds them wherever moetrain is installed."""
