"""Foreign weights, in and out: tables of names, one file a layout. Knows parameter trees and files, nothing else."""
