"""Files in gs:// and s3:// buckets, and locks that several processes and hosts respect.

Imports errors.py alone. Start at buckets.py.
"""
