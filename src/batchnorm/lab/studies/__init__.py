"""Experiments that test one claim each, with error bars."""
