"""Files in gs:// and s3:// buckets, and locks shared by processes and hosts.

Imports errors.py alone. Start at buckets.py.
"""
