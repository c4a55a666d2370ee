"""Aggregators: from the clients' values to one value at the server."""

from fedjax_core.aggregators.base import AggregateFn as AggregateFn
from fedjax_core.aggregators.base import Aggregator as Aggregator
from fedjax_core.aggregators.base import Wrapper as Wrapper
from fedjax_core.aggregators.base import chain as chain
from fedjax_core.aggregators.base import is_present as is_present
from fedjax_core.aggregators.computation import as_computation as as_computation
from fedjax_core.aggregators.low_rank import power_sgd as power_sgd
from fedjax_core.aggregators.quantiles import NormEstimator as NormEstimator
from fedjax_core.aggregators.quantiles import fixed as fixed
from fedjax_core.aggregators.quantiles import quantile as quantile
from fedjax_core.aggregators.robust import clip_by_global_norm as clip_by_global_norm
from fedjax_core.aggregators.robust import compression_aggregator as compression_aggregator
from fedjax_core.aggregators.robust import default_clipping_norm as default_clipping_norm
from fedjax_core.aggregators.robust import default_zeroing_norm as default_zeroing_norm
from fedjax_core.aggregators.robust import robust_aggregator as robust_aggregator
from fedjax_core.aggregators.robust import zero_by_norm as zero_by_norm
from fedjax_core.aggregators.sums import mean as mean
from fedjax_core.aggregators.sums import sum as sum
from fedjax_core.aggregators.sums import unweighted_mean as unweighted_mean
