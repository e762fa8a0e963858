"""The public zoo: cases of each library, the checks that every case must pass, and the table of what they found."""
