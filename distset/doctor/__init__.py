"""Checks before hours are spent: data, labels, splits, settings, disk, memory, versions, cluster; see `examine`."""
