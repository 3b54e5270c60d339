//! The client against a server of scripts: its arithmetic, not anybody's speed.
