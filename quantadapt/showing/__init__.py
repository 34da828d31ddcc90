"""What somebody who looks is shown while work goes on, and what is kept from them."""
