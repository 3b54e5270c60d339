//! The client against a server of scripts: its arithmetic, not anybody's speed. What a time is compared with is a bound
//! that a busy machine cannot break.

mod answers;
mod double;
mod limits;
mod model;
mod plans;
mod reports;
