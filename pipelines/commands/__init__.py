"""The commands of `fer`, in groups; `pipelines.cli` puts them together."""
