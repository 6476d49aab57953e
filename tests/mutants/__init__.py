"""`make mutants`: do the tests notice a fault? Small faults are put in one by one; see docs/mutants.md."""
