"""An output as other tools want it: profiles for pycytominer, or the feature table as one file.

source.py    which files an output consists of, whether any are missing, what is quarantined where
grouping.py  rows of a plate -> groups in order (site, well, image, object)
pooling.py   mean and median over runs of rows
names.py     names of wide columns
profiles.py  wide profiles, plate by plate, within bounded memory
plain.py     the feature table as it is
target.py    one file, CSV or Parquet, written atomically
"""
