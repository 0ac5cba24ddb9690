"""What turns a file into a row that others trust: skeletons, contract, evaluation, verification, reruns, badges."""
