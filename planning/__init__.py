"""Plans of runs on devices that are not there: estimates, a search, and what compilers say."""
