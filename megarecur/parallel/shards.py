from megarecur.train.shards import Shard, whole  # temporary
